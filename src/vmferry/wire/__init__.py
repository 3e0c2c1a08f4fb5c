"""The grammar of QEMU's migration stream: bytes to events, and back.

Sans-IO: nothing in here opens, reads, waits or takes the time.
"""
