"""Where ranks run: start or join Ray, place and name workers, watch them, check resources before a start."""
