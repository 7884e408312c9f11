"""A simulated product on MicroPython: sensor.py runs on the device, peers.py is what it talks to, on the host."""
