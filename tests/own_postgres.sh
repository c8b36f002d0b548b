# Sourced: a PostgreSQL of one's own, with its data in a folder that goes away.

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }
# PostgreSQL refuses to run as root.
as_owner() { if [ "$(id -u)" -eq 0 ]; then setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; else "$@"; fi; }
newest_postgres() { find /usr/lib/postgresql -maxdepth 2 -name bin -type d 2>/dev/null | sort -V | tail -n 1; }

# install PACKAGE…: by Debian's package manager.
install_packages() {
  [ $# -gt 0 ] || return 0
  echo "installing $*"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# A port on which nobody listens, below those that connections to others get.
free_port() {
  local port
  while port=$((10000 + RANDOM % 20000)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

# start_postgres FOLDER: on a free port; the address is in $postgres_url afterwards.
start_postgres() {
  local folder=$1 bin port options
  bin=$(newest_postgres)
  chmod 755 "$folder"
  mkdir "$folder/postgres"
  [ "$(id -u)" -ne 0 ] || chown postgres: "$folder/postgres"
  as_owner "$bin/initdb" --pgdata "$folder/postgres/data" --username postgres --auth trust --encoding UTF8 --locale C >/dev/null
  port=$(free_port)
  # Durable as in production; only the number of connections is larger, for many nodes and tests side by side.
  options="-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories=$folder/postgres -c max_connections=500"
  as_owner "$bin/pg_ctl" --pgdata "$folder/postgres/data" --log "$folder/postgres/log" --options "$options" --wait start >/dev/null ||
    { cat "$folder/postgres/log"; return 1; }
  # shellcheck disable=SC2034
  postgres_url="postgres://postgres@127.0.0.1:$port"
}

# stop_postgres FOLDER: at once, since nobody needs the data any more.
stop_postgres() {
  as_owner "$(newest_postgres)/pg_ctl" --pgdata "$1/postgres/data" --mode immediate stop >/dev/null 2>&1 || true
}
