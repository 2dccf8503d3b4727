"""The command line `ldr`: the parser, one module a command, the overview picture."""
