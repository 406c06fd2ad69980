"""`python -m engine` and `deepspeed --module engine`: the `lethe` command."""

from engine.cli import main

main()
