"""Block families, one file each: its recipes under every implementation's names. A file here is found by being here."""
