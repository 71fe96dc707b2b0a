"""Models as others have them: published weights fetched, own ones published."""
