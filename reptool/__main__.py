"""``python -m reptool``."""

from reptool.cli import main

if __name__ == "__main__":
    main()
