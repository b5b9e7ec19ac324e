"""tensorflow-datasets builder for one domain of a text folder."""
