"""`python -m baton.cli`: the `baton` command where its script is not on the path."""

from baton.cli.main import main

if __name__ == "__main__":
    main()
