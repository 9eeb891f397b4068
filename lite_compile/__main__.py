"""`python -m lite_compile` is `liteattention`."""

from .cli import main

raise SystemExit(main())
