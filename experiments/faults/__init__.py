"""What a machine or a person may do to a run: killed processes, hostile input, load."""
