"""MicroPython firmware for emulated boards, built from Debian's sources, and the product run on it."""
