"""A service around one opened pipeline: jobs, shared passes, and the HTTP that they are reached by."""
