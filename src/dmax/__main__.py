"""`python -m dmax`, for launchers such as torchrun that start a module in several processes."""

from dmax_command import main

if __name__ == "__main__":
    main()
