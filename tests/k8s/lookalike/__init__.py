"""A look-alike of Kubernetes and KubeRay's operator: it runs rendered manifests on this machine, for real.

documents     what was applied: by kind, namespace and name; selectors, quantities
network       a bridge, addresses, the names of Services
services      addresses that follow readiness
policies      NetworkPolicies as nftables rules
workloads     the pods of what is no RayService
kubelet/      a node's part: pods (sandbox, init containers, restarts, preStop, the end), containers, their cgroups,
              variables, volumes and probes, and what stands for the image nibble-serve
kuberay/      the operator's part: the RayCluster and RayService controllers, and the pods that they make
cluster       the composition root: what tests use
commands      commands of the system
leftovers     what an interrupted run left

Where Kubernetes and KubeRay 1.7 have a default or an order of steps, theirs is kept: a pod that is deleted leaves
its Services first, then preStop, SIGTERM and SIGKILL follow; a container that ends is started again in its pod, or its
pod made anew, as restartPolicy says. Namespaces, mounts and processes end with the process that runs the look-alike,
however that ends.

What is not there: an API server (the caller hands documents over), scheduling (there is one node), DNS (every pod reads
one hosts file), sidecars (a pod runs its init containers and its first container), and the in-tree autoscaler.
"""
