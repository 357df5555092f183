"""``python -m server`` is ``motserve``: for launchers that start a module, such as torchrun."""

from server.cli import main

main()
