"""What the manifests of k8s/ must hold to, found without a cluster: schemas, KubeRay's rules, and nibble's own."""
