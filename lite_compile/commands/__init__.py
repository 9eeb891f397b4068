"""One file per subcommand of `liteattention`: `HELP`, `add_arguments(parser)` and `run(args) -> exit status`."""
