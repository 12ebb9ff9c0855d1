"""What users see: history, report, pictures, warnings. It knows quantities by name, and no method."""
