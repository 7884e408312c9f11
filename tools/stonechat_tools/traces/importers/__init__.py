"""Anyone's captures as windows: each importer feeds counters into the device's own window.Window."""
