"""The commands of the command line, one a file: each parses, calls a library function, and prints what it returns."""
