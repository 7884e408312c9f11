"""What a device does on an ordinary day, and what attackers do to it: bounded, harmless, on loopback or in a namespace
of one's own. The demo, the tests and the evaluation run these as processes of their own."""
