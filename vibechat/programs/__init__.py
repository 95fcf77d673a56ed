"""One file a program, each read top to bottom, each with a `main(argv)`."""
