/* Preloaded into a process and all that it starts: notes each name that is looked up and each host beyond this machine
   that is connected or sent to, a line each, in the file that NETWORK_LOG names. Built and used by network.py. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void note(const char *what, const char *where) {
  const char *path = getenv("NETWORK_LOG");
  char line[600];
  if (!path) return;
  int size = snprintf(line, sizeof line, "%s %s (%s)\n", what, where, program_invocation_short_name);
  int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (file < 0) return;
  if (write(file, line, size < (int)sizeof line ? size : (int)sizeof line - 1) < 0) abort();
  close(file);
}

static void note_name(const char *name) {
  unsigned char address[16];
  char own[256] = "";
  gethostname(own, sizeof own - 1);
  if (name && *name && strcmp(name, "localhost") && strcmp(name, own) && inet_pton(AF_INET, name, address) != 1 &&
      inet_pton(AF_INET6, name, address) != 1)
    note("look-up", name);
}

static int same(const struct sockaddr *one, const struct sockaddr *other) {
  if (!other || one->sa_family != other->sa_family) return 0;
  if (one->sa_family == AF_INET)
    return ((struct sockaddr_in *)one)->sin_addr.s_addr == ((struct sockaddr_in *)other)->sin_addr.s_addr;
  return !memcmp(&((struct sockaddr_in6 *)one)->sin6_addr, &((struct sockaddr_in6 *)other)->sin6_addr, 16);
}

/* A loopback address, an address of this machine's, or none at all. */
static int is_here(const struct sockaddr *address) {
  struct sockaddr_in mapped = {.sin_family = AF_INET};
  struct ifaddrs *all, *each;
  int here = 0;
  if (address->sa_family == AF_INET6) {
    const struct in6_addr *six = &((struct sockaddr_in6 *)address)->sin6_addr;
    if (IN6_IS_ADDR_LOOPBACK(six) || IN6_IS_ADDR_UNSPECIFIED(six)) return 1;
    if (IN6_IS_ADDR_V4MAPPED(six)) {
      memcpy(&mapped.sin_addr, six->s6_addr + 12, 4);
      address = (struct sockaddr *)&mapped;
    }
  }
  if (address->sa_family == AF_INET) {
    unsigned number = ntohl(((struct sockaddr_in *)address)->sin_addr.s_addr);
    if (number == 0 || number >> 24 == 127) return 1;
  }
  if (getifaddrs(&all)) return 0;
  for (each = all; each && !here; each = each->ifa_next) here = same(address, each->ifa_addr);
  freeifaddrs(all);
  return here;
}

static void note_address(const char *what, const struct sockaddr *address) {
  char host[INET6_ADDRSTRLEN] = "", where[80];
  if (!address || (address->sa_family != AF_INET && address->sa_family != AF_INET6) || is_here(address)) return;
  const void *raw = address->sa_family == AF_INET ? (void *)&((struct sockaddr_in *)address)->sin_addr
                                                  : (void *)&((struct sockaddr_in6 *)address)->sin6_addr;
  inet_ntop(address->sa_family, raw, host, sizeof host);
  snprintf(where, sizeof where, "%s port %d", host, ntohs(((struct sockaddr_in *)address)->sin_port));
  note(what, where);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
  note_name(node);
  return NEXT(getaddrinfo)(node, service, hints, result);
}

struct hostent *gethostbyname(const char *name) {
  note_name(name);
  return NEXT(gethostbyname)(name);
}

int gethostbyname_r(const char *name, struct hostent *entry, char *buffer, size_t size, struct hostent **result,
                    int *error) {
  note_name(name);
  return NEXT(gethostbyname_r)(name, entry, buffer, size, result, error);
}

int connect(int socket, const struct sockaddr *address, socklen_t size) {
  int type = 0;
  socklen_t type_size = sizeof type;
  getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &type_size);
  /* A datagram socket that is connected sends nothing (programs learn their own address that way), but for look-ups. */
  if (address && (type != SOCK_DGRAM || ntohs(((struct sockaddr_in *)address)->sin_port) == 53))
    note_address("connection to", address);
  return NEXT(connect)(socket, address, size);
}

ssize_t sendto(int socket, const void *data, size_t length, int flags, const struct sockaddr *address, socklen_t size) {
  note_address("message to", address);
  return NEXT(sendto)(socket, data, length, flags, address, size);
}
