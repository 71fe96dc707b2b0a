"""Exchange of models: fetching published weights and publishing your own."""
