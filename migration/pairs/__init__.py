"""Backends of ours in Ray's registry of collective groups: groups of two that send and receive."""
