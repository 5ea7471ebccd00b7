"""From audio to training targets: manifests, features, k-means labels and their quality."""
