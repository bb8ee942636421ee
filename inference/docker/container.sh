#!/usr/bin/env bash
# Build, try and save the algorithm container; from a clone, with Docker 23 or newer (DOCKER=podman for another).
#
#   inference/docker/container.sh build [MODEL]          with MODEL inside the image; without, it is mounted
#   inference/docker/container.sh try INPUT OUTPUT [MODEL]   as the platform runs it, with what it forbids forbidden
#   inference/docker/container.sh save FILE.tar.gz       what is uploaded
#
# TAG (masksam) names the image. Of the build: OUTPUT_SLUG, CHANNELS, FOLDS, MIRRORING (true or false); all can be set in
# container.json in the model folder instead. Of the trial: GPUS (all; none without a GPU), MEMORY (16g).
set -euo pipefail

docker=${DOCKER:-docker}
tag=${TAG:-masksam}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

folder() {
    [[ -d $1 ]] || { echo "error: $1 is not a folder" >&2; exit 2; }
    (cd -- "$1" && pwd)
}

case ${1:-} in
build)
    [[ $# -le 2 ]] || usage
    options=(--platform linux/amd64 --file "$root/inference/docker/Dockerfile" --tag "$tag")
    for name in OUTPUT_SLUG CHANNELS FOLDS MIRRORING; do
        [[ -z ${!name:-} ]] || options+=(--build-arg "$name=${!name}")
    done
    if [[ $# -eq 2 ]]; then
        model=$(folder "$2")
        options+=(--target with-model --build-context "model=$model")
    fi
    exec "$docker" build "${options[@]}" "$root"
    ;;
try)
    [[ $# -eq 3 || $# -eq 4 ]] || usage
    input=$(folder "$2")
    mkdir -p -- "$3"
    output=$(folder "$3")
    chmod o+rwx -- "$output" # the container's user is another
    options=(--rm --platform linux/amd64 --network none --read-only --tmpfs /tmp --cap-drop all
        --security-opt no-new-privileges --pids-limit 512 --shm-size 64m
        --memory "${MEMORY:-16g}" --memory-swap "${MEMORY:-16g}"
        --volume "$input:/input:ro" --volume "$output:/output")
    [[ ${GPUS:-all} == none ]] || options+=(--gpus "${GPUS:-all}")
    if [[ $# -eq 4 ]]; then
        model=$(folder "$4")
        options+=(--volume "$model:/opt/ml/model:ro")
    fi
    exec "$docker" run "${options[@]}" "$tag"
    ;;
save)
    [[ $# -eq 2 ]] || usage
    "$docker" save "$tag" | gzip -c > "$2.part"
    mv -- "$2.part" "$2"
    ;;
*)
    usage
    ;;
esac
