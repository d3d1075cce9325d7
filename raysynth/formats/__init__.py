"""Medical files and databases, read into volumes and nodules."""
