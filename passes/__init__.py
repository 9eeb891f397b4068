"""Graph passes, in the order in which `lite_compile.backend` calls them. `docs/passes.md` has one row per pass."""
