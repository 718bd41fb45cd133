"""The command `nha-megatron`: one file a subcommand, each a `Command` (command.py); main.py picks one and runs it."""
