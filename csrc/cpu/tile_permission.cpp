#include "tile_permission.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wandapp {

#if defined(__linux__) && defined(__x86_64__)
namespace {

// asm/prctl.h of Linux 5.16, and the number of the state in XCR0; older headers have neither.
constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;

}  // namespace

bool may_use_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#else
bool may_use_tiles() { return false; }
#endif

}  // namespace wandapp
