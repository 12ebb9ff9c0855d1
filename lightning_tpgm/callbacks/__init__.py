"""The callbacks, one method a file."""
