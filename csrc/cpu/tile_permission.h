#pragma once

namespace wandapp {

// Asks Linux once whether this process, all its threads, may use AMX tiles: without it their first use ends the program.
// False where it is refused, and on other systems.
bool may_use_tiles();

}  // namespace wandapp
