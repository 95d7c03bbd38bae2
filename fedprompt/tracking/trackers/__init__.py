"""The trackers that come with fedprompt, one file each."""
