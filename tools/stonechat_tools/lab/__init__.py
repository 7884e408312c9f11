"""What a device does on an ordinary day, and what attackers do to it: bounded, harmless, on loopback or in a private
network namespace. The demo, the tests and the evaluation run these as processes.
"""
