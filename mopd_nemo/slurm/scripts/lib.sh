# Sourced by the scripts of a job. Every node sees $MOPD_LOGS; files in it are how they speak to each other:
#   token         written first; a node that does not see it has no shared log directory
#   beats/NODE    a number that grows while the node lives
#   head          address of the Ray head, once it listens
#   stop          asks the driver to save and end; holds why
#   driver.exit   exit code of the driver, once it has ended
#   failed        first failure: node, reason and log, one a line
# shellcheck shell=bash

note() { printf '[mopd %(%F %T)T] %s\n' -1 "$*"; }

# put FILE TEXT: readers see the whole text or no file.
put() {
  printf '%s\n' "$2" > "$1.$BASHPID" && mv -f "$1.$BASHPID" "$1"
}

# record_failure NODE REASON LOG: the first one counts, later ones follow from it.
record_failure() {
  printf '%s\n' "$@" > "$MOPD_LOGS/failed.$BASHPID"
  ln "$MOPD_LOGS/failed.$BASHPID" "$MOPD_LOGS/failed" 2> /dev/null
  rm -f "$MOPD_LOGS/failed.$BASHPID"
}

# address_of NODE: its IPv4 address that other nodes can reach.
address_of() {
  local address
  address=$(getent ahostsv4 "$1" | awk '$1 !~ /^127\./ { print $1; exit }')
  [[ -n $address ]] || address=$(hostname -I | awk '{ print $1 }')
  printf '%s\n' "$address"
}

# listens ADDRESS PORT
listens() { (exec 3<> "/dev/tcp/$1/$2") 2> /dev/null; }
