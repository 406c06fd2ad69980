"""`python -m engine` and `deepspeed --module engine`: the `lethe` command."""

from engine.cli.app import main

main()
