"""What KubeRay's operator does with a RayService, after its version 1.7."""
