"""A fleet of real agents in one process, over recorded or drawn windows."""
