"""``python -m vlv`` is the ``vlv`` command."""

from vlv.cli import main

if __name__ == "__main__":
    main()
