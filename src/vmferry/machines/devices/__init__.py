"""The devices of the board, each with its state declared.

Every device answers ``read(offset, size)`` and ``write(offset, size, value)`` for the ports or
addresses that :class:`vmferry.machines.bus.DeviceBus` gives it.
"""
