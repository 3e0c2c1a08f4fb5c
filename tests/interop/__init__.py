"""Machines taken out of a real QEMU and put back into another one, through the public interface."""
