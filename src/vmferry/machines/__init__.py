"""Machines that vmferry hosts itself: a small PC on KVM or on the Unicorn emulator."""
