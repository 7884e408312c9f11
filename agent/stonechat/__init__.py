"""stonechat: a canary in every device. Importing this package does nothing; take the rooms that you need."""

__version__ = "0.1.0"
