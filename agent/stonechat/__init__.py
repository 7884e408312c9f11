"""stonechat: anomaly detection on the device. Importing this package does nothing; import the modules that you need."""

__version__ = "0.1.0"
