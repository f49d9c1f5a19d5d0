"""`python -m cm`: the command `cm`, for launchers that start modules (torchrun -m cm train ...)."""

from cm.commands.main import main

if __name__ == "__main__":
    main()
