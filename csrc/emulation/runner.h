// Kernels by name, callable with a list of arguments of unknown type (see runner.cpp).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "simt.h"

namespace emulation {

// One argument: a pointer into a buffer of its own, or a number.
struct Argument {
    void* pointer = nullptr;
    int64_t number = 0;
};

using Bound = std::function<void()>;
using Binder = std::function<Bound(const std::vector<Argument>&)>;

inline std::map<std::string, Binder>& kernels() {
    static std::map<std::string, Binder> table;
    return table;
}

template <class T>
T convert(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>)
        return static_cast<T>(argument.pointer);
    else
        return static_cast<T>(argument.number);
}

template <class... Parameters, size_t... I>
Binder binder(void (*kernel)(Parameters...), std::index_sequence<I...>) {
    return [kernel](const std::vector<Argument>& arguments) -> Bound {
        if (arguments.size() != sizeof...(Parameters))
            throw EmulationError("the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments");
        return [=] { kernel(convert<Parameters>(arguments[I])...); };
    };
}

// A static object of this class makes a kernel callable: `static Kernel k("name", &function);`
struct Kernel {
    template <class... Parameters>
    Kernel(const char* name, void (*kernel)(Parameters...)) {
        kernels()[name] = binder(kernel, std::index_sequence_for<Parameters...>{});
    }
};

}  // namespace emulation
