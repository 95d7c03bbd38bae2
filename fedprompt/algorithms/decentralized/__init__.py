"""Methods without a server: clients mix with their neighbours."""
