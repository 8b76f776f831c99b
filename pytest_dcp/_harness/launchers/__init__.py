"""How the processes of a world are started: by forking, or as fresh interpreters."""
