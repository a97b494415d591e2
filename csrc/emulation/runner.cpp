// emulate REQUEST RESULT: runs the launches of a file and writes their buffers back.
//
// REQUEST, little-endian: per launch
//   u32 length, name;  u32 grid x, y, z, threads, shared bytes, order;  u32 arguments, each
//   'p' u64 bytes, u64 offset, data: a pointer to a copy of data, `offset` bytes after an address aligned to 256
//   'b' u32 index: the pointer of argument number `index` counted over all launches so far
//   'i' i64: a number            '0': a null pointer
// RESULT: the data of every 'p', in order, after the last launch. Each buffer is exactly as large as its data, so that
// AddressSanitizer sees any access outside it. A violated rule ends with status 3 and one line on stderr.
#include "runner.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>

namespace {

using namespace emulation;

constexpr size_t kAlignment = 256;

struct Buffer {
    uint8_t* start = nullptr;
    size_t offset = 0, bytes = 0;
};

template <class T>
T take(std::istream& in) {
    T value{};
    if (not in.read(reinterpret_cast<char*>(&value), sizeof value)) throw EmulationError("the request ends too early");
    return value;
}

Argument take_argument(std::istream& in, std::vector<Buffer>& buffers, std::vector<Argument>& all) {
    Argument argument;
    const char kind = take<char>(in);
    if (kind == 'p') {
        Buffer buffer;
        buffer.bytes = take<uint64_t>(in);
        buffer.offset = take<uint64_t>(in);
        void* memory = nullptr;
        if (posix_memalign(&memory, kAlignment, buffer.offset + buffer.bytes) != 0)
            throw EmulationError("out of memory");
        buffer.start = static_cast<uint8_t*>(memory);
        in.read(reinterpret_cast<char*>(buffer.start + buffer.offset), static_cast<std::streamsize>(buffer.bytes));
        buffers.push_back(buffer);
        argument.pointer = buffer.start + buffer.offset;
    } else if (kind == 'b') {
        argument = all.at(take<uint32_t>(in));
    } else if (kind == 'i') {
        argument.number = take<int64_t>(in);
    } else if (kind != '0') {
        throw EmulationError("unknown kind of argument");
    }
    all.push_back(argument);
    return argument;
}

void run(std::istream& in, std::vector<Buffer>& buffers, std::vector<Argument>& all) {
    std::string name(take<uint32_t>(in), ' ');
    in.read(name.data(), static_cast<std::streamsize>(name.size()));
    Launch shape;
    shape.grid.x = take<uint32_t>(in);
    shape.grid.y = take<uint32_t>(in);
    shape.grid.z = take<uint32_t>(in);
    shape.threads = take<uint32_t>(in);
    shape.shared_bytes = take<uint32_t>(in);
    shape.order = static_cast<Order>(take<uint32_t>(in));
    std::vector<Argument> arguments(take<uint32_t>(in));
    for (Argument& argument : arguments) argument = take_argument(in, buffers, all);
    const auto found = kernels().find(name);
    if (found == kernels().end()) throw EmulationError("no kernel is called " + name);
    launch(shape, found->second(arguments));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::ifstream in(argv[1], std::ios::binary);
    std::vector<Buffer> buffers;
    std::vector<Argument> all;
    try {
        while (in.peek() != EOF) run(in, buffers, all);
    } catch (const EmulationError& error) {
        std::cerr << "emulation: " << error.what() << '\n';
        return 3;
    }
    std::ofstream out(argv[2], std::ios::binary);
    for (const Buffer& buffer : buffers) {
        const auto* data = reinterpret_cast<const char*>(buffer.start + buffer.offset);
        out.write(data, static_cast<std::streamsize>(buffer.bytes));
        std::free(buffer.start);
    }
    return out.good() ? 0 : 2;
}
