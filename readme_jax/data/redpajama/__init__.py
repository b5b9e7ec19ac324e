"""RedPajama-1T: its published files, and a tensorflow-datasets builder for its seven sources."""
